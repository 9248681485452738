"""`parallel_core.compat.mindspeed` under the path that scripts import: its submodules too are the same modules."""

import sys

from parallel_core.compat import mindspeed

_NEW, _OLD = mindspeed.__name__, __name__
for _name in [name for name in sys.modules if name == _NEW or name.startswith(_NEW + ".")]:
    sys.modules[_OLD + _name.removeprefix(_NEW)] = sys.modules[_name]
