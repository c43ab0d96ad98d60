"""The commands, by subject. A function that takes only `Arguments` is a command; `cli.COMMANDS` names it."""
