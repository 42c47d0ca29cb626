"""The papers' claims as experiments; the folders mirror the sections."""
