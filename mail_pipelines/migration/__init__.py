"""Moving from another mailing system: its lists, fields, subscribers, suppressions and bounces become ours. Each system is one module that reads."""
