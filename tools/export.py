import sys

from vitzoo.cli import main

main(["export", *sys.argv[1:]])
