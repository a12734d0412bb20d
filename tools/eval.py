import sys

from vitzoo.cli import main

main(["eval", *sys.argv[1:]])
