"""`python -m fedepth` and `fedepth`: quiet if stopped while it still loads its libraries."""

from fedepth.start import start


def main() -> None:
    start("fedepth.cli")


if __name__ == "__main__":
    main()
