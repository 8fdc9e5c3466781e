"""OpenTelemetry: what a front notes of sampled requests, and how it leaves as OTLP; where it is off, nothing."""
