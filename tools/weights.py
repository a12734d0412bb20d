import sys

from vitzoo.cli import main

main(["weights", *sys.argv[1:]])
