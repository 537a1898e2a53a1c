"""All modules of the package, imported, for the process that the tests of recipes fork."""

import importlib
import pkgutil

import efftrain

for module in pkgutil.walk_packages(efftrain.__path__, "efftrain."):
    importlib.import_module(module.name)
