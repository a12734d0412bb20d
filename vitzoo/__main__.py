"""`python -m vitzoo`, the same as the `vitzoo` command; `accelerate launch -m vitzoo train ...`."""

from vitzoo.cli import main

main()
