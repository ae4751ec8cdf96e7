"""Train an adapter: data and a method make one, perhaps over frozen ones; a release comes out."""
