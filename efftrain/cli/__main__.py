"""``python -m efftrain.cli``."""

from efftrain.cli.main import main

main()
