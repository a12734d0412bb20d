import sys

from vitzoo.cli import main

main(["train", *sys.argv[1:]])
