"""Muon against PyTorch's, and which parameters it gets."""

import torch
from torch import nn

from canon.core.training.fit import TrainingConfig
from canon.core.training.optimizers import Muon, optimizers


def test_muon_takes_the_steps_of_pytorchs_also_on_kernels():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((24, 40), (40, 24), (32, 16, 3, 3))]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    mine = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(1)
        mine.step()
        other.step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p.flatten(1), q)


def test_muon_gets_hidden_matrices_and_kernels_alone():
    model = nn.ModuleDict(
        {
            "token_embedding": nn.Embedding(10, 32),
            "conv_in": nn.Conv2d(4, 32, 3),
            "conv": nn.Conv2d(32, 32, 3),
            "linear": nn.Linear(32, 32),
            "conv_out": nn.Conv2d(32, 4, 3),
            "head": nn.Linear(32, 10),
        }
    )
    adamw, muon = optimizers(model, TrainingConfig(optimizer="muon"))
    assert isinstance(muon, Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert hidden == {"conv.weight", "linear.weight"}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - hidden
