"""`python -m litconvert`, and what `accelerate launch -m litconvert` runs."""

from litconvert.cli.app import main

if __name__ == "__main__":
    main()
