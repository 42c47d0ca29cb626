"""How we know: runs, claims, statistics, reports and the ledger of results. Importing it loads no torch."""

from canon.core.lab.claim import Claim, Lab, Measurement, Record, claim, claims_of, verify
from canon.core.lab.run import Run

__all__ = ["Claim", "Lab", "Measurement", "Record", "Run", "claim", "claims_of", "verify"]
