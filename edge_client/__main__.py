"""`python -m edge_client` and `fedepth-client`: quiet if stopped while it still loads its libraries."""

from fedepth.start import start


def main() -> None:
    start("edge_client.cli")


if __name__ == "__main__":
    main()
