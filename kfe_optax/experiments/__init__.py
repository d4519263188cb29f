"""The training job: data, models, and the commands ``train``, ``compare`` and ``layers``.

Nothing in the library imports this package; it uses the library as any user does.
"""
