"""The one table of routes: of dialects, the OpenAPI document and the README's table of doors."""
