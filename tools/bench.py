import sys

from vitzoo.cli import main

main(["bench", *sys.argv[1:]])
