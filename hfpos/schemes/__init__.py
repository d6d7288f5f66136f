"""One file per positional scheme; `hfpos.schemes()` lists them, `hfpos.schemes.Yarn(factor=4)` builds one.

The file name is the registry name is the paper's lower-case name. Nothing here is edited to add one: every module of this
package is imported and its `Scheme` subclasses are entered under their `name`.
"""

import sys

from hfpos.registry import CallablePackage, Registry
from hfpos.scheme import Scheme


REGISTRY: Registry[type[Scheme]] = Registry("scheme")
REGISTRY.discover(__name__, Scheme)
globals().update({cls.__name__: cls for cls in REGISTRY.as_dict().values()})
sys.modules[__name__].__class__ = CallablePackage
