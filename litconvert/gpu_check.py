"""`python -m litconvert.gpu_check`: whether what litconvert does works on this machine, as `litconvert env --check`."""

from litconvert.cli.check import main

if __name__ == "__main__":
    main()
