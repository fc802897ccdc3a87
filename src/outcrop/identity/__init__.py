"""Who may do what: accounts, access keys, roles and policies behind one authorize()."""
