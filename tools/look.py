import sys

from vitzoo.cli import main

main(["look", *sys.argv[1:]])
