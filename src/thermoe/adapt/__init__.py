"""The closed loop: the only place where readings and losses meet routers."""
