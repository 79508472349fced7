"""Mail that comes back, through a real Exim and a real IMAP server."""
