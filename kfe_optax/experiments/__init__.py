"""The training job: data, models, and the commands ``train``, ``compare``, ``layers``,
``sweep`` and ``diagnose``.

Nothing in the library imports this package; it uses the library as any user does.
"""
