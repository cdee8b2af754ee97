"""What every process needs: errors, configuration, the fold tree, the data plan, layouts.

Nothing here opens a socket, starts a thread or imports a module of another layer.
"""
