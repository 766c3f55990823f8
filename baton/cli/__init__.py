"""The `baton` command. Parts of the server run as processes of their own: this package imports none of them."""
