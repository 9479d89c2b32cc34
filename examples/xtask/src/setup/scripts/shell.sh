# Nothing by itself; send `sh COMMAND` lines to the console.
