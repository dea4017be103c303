"""The methods of `vitkit clean`, one a file; the package itself is callable as the verb."""

from vitkit import _callable_package

_callable_package(__name__)
