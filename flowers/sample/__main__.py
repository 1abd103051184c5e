"""Draw the sample dataset: python -m flowers.sample --root data/sample"""

import argparse

from flowers import command
from flowers.sample.dataset import write_sample


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    help_root = "folder to make (default: %(default)s)"
    parser.add_argument("--root", default="data/sample", help=help_root)
    args = parser.parse_args()
    print(write_sample(args.root))


if __name__ == "__main__":
    main()
