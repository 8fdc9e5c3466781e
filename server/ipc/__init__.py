"""How our processes talk: frames of requests and answers, and control messages."""
