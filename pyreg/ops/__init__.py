"""One module an operator: the public function, and its fake, autograd, autocast and vmap rules."""

from pyreg import _requirements

_requirements.check()
