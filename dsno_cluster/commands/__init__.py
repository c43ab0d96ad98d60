"""What the commands do, by subject. A function that takes `Arguments` alone is a command; `cli.COMMANDS` names it."""
