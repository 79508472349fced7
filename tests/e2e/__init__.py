"""The whole product as its users run it: daemon, web server, catchers, command line, browser."""
