"""The verbs of the ``clk`` command. Each module has ``main(arguments) -> exit status``."""
