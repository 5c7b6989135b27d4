from dataclasses import dataclass


@dataclass
class RequestStateStats:
    arrival_time: float
    queued_ts: float
    scheduled_ts: float
    first_token_ts: float
    last_token_ts: float
    first_token_latency: float
