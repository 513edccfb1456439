"""`python -m coordinator` and `fedepth-coordinator`: quiet if stopped while it still loads its libraries."""

from fedepth.start import start


def main() -> None:
    start("coordinator.cli")


if __name__ == "__main__":
    main()
