"""What runs at a site: leaf forms, and the composers, which are forms made of forms. Floor 2, runtime."""
