"""Where hosts come from: a list of bare ones, a command of the operator, catchers of this machine. One module for each kind, and the file that names them."""
