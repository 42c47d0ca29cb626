"""The Transformer: Attention Is All You Need (Vaswani et al., 2017).

Paper: https://arxiv.org/abs/1706.03762

The idea. To translate, every word must find the words it depends on; a recurrent network carries them through one
state, step by step. A Transformer lets every position look at all others at once and weigh them by how well its query
fits their keys: Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V (Eq. 1). Stacks of this, with a small network at
each position, are the whole model: an encoder that reads the source, and a decoder that writes the translation while
looking at what it wrote and at the encoder's output.

Faithful. Post-LN sub-layers LayerNorm(x + Dropout(Sublayer(x))), multi-head attention without biases, sinusoidal
positions, one matrix for source embedding, target embedding and output, embeddings times sqrt(d_model), dropout on
their sums with the positions, ReLU networks, label smoothing, Adam with the paper's schedule, byte-pair vocabulary of
both languages together, batches of sentence pairs of about equal length, averaging of the last checkpoints, beam
search with length penalty; `base` and `big` have the paper's numbers (Table 3 and §5).

Scaled down. `laptop` learns English to German from some 11,000 messages of the user interfaces of free software
instead of 4.5 million sentences of WMT 2014, which no package carries, with 2 layers, d_model 256, d_ff 512 and a
vocabulary of 2,000; `--corpus FILE` reads any other pairs.

Deviations.
    paper                              ours                                why
    initialisation not stated          Glorot uniform; embeddings          as in the authors' code (tensor2tensor)
                                       N(0, 1/d_model)
    checkpoints by the clock           the weights at the last             the same result on any machine
    (10 minutes apart)                 evaluations are averaged
    placeholders in the text are       ①, ② ... on both sides              messages of programs have many
    words like others
    learning rate falls as             `laptop`: by a cosine to 2% of      1/sqrt(step) is still 8 times the paper's
    1/sqrt(step)                       its peak                            last rate after 3,000 steps

Run. `canon run transformer`: 10 min 46 s of training on 2 cores (3,800 steps), to 27.8 BLEU on 487 held-out messages;
15% come out word for word as their translator wrote them. These texts repeat themselves: taking over the translation of
the most similar training message gets 26.9 BLEU and 0.4%. Short messages come out right, long ones often do not.
"""

from canon.language.transformer.model import PRESETS, Config, Transformer
from canon.language.transformer.training import batches, build, from_pretrained, sample, train, translate

__all__ = ["PRESETS", "Config", "Transformer", "batches", "build", "from_pretrained", "sample", "train", "translate"]
