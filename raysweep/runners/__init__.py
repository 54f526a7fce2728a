"""Where stages run: in this process, or in Ray gangs."""
