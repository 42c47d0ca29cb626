"""Every claim of half a minute or less is verified here, and comes out as it was published."""

from importlib import import_module
from pathlib import Path

import pytest

import canon
from canon.core.lab import ledger
from canon.core.lab.claim import claims_of, verify
from canon.core.lab.ledger import committed

CLAIMS = [
    claim
    for name in canon.systems()
    for claim in claims_of(import_module(canon.load(name).__name__.replace("canon.", "canon.claims.", 1)))
]

PUBLISHED = {(kept.system, kept.claim): kept.verdict for records in committed().values() for kept in records}


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.quick], ids=lambda c: f"{c.system}-{c.name}")
def test_a_quick_claim_comes_out_as_published(claim, tmp_path: Path):
    record = verify(claim, root=tmp_path, threads=1, quiet=True)
    assert record.verdict == PUBLISHED[claim.system, claim.name], record.reason


def test_every_claim_is_published_or_named_as_not_verified():
    claims = {(claim.system, claim.name): claim for claim in CLAIMS}
    assert claims.keys() >= PUBLISHED.keys()
    page = ledger.PAGE.read_text("utf-8")
    for key in claims.keys() - PUBLISHED.keys():
        assert not claims[key].quick, f"{key} takes {claims[key].minutes} minutes: verify and publish it"
        assert f"- {claims[key].system}: {claims[key].statement}" in page
