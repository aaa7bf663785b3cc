"""The merge methods, a file for each: formula, parameters, documentation. Importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
