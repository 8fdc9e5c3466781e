"""The one table of routes: of dialects, the OpenAPI document and the reference's page of routes."""
