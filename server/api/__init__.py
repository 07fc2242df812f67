"""The HTTP side: the only package that knows the web framework.

`app.create_app` builds the application, `serving.serve` runs it, `config` has the options.
"""
