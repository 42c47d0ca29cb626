"""``python -m canon`` and ``torchrun -m canon``: the same as the ``canon`` command."""

from canon.cli import main

if __name__ == "__main__":
    main()
