import sys

from vitzoo.cli import main

main(["predict", *sys.argv[1:]])
