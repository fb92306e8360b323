"""The server's automations: runs that stop sending heartbeats are marked as crashed, and failures are reported.

Notifications go through a notification block of any kind named `quantize-gemma-alerts`: created in Prefect's UI
(Slack, email, …), or by `make deploy` from QUANTIZE_GEMMA_ALERTS, the URL of a webhook. Without one, notifications are
off.
"""

import os
from datetime import timedelta
from uuid import UUID

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument, StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

BLOCK = "quantize-gemma-alerts"
# A placeholder: the block keeps the URL itself among its secrets.
WEBHOOK = "{{url}}"
MESSAGE = {"subject": "{{subject}}", "text": "{{body}}"}
OUR_FLOWS: dict[str, str | list[str]] = {
    "prefect.resource.role": "flow",
    "prefect.resource.name": ["quantize-gemma", "diagnose", "prune-store"],
}
END_EVENTS = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")}
# Workers send a heartbeat every 30 s (PREFECT_FLOWS_HEARTBEAT_FREQUENCY). A server that is restarting receives none,
# and must not conclude that every run has crashed.
SILENCE_SECONDS = 900.0
# The maximum time between two nightly runs: a day of 25 hours, and a grace period of one hour. Change it with the
# schedule.
NIGHT_SECONDS = 26 * 3600.0
BODY = (
    "Flow run {{ flow_run.name }} of quantize-gemma is {{ flow_run.state.name }}: {{ flow_run.state.message }}\n"
    "{{ flow_run|ui_url }}"
)


def save_alerts(client: SyncPrefectClient, webhook: str | None) -> None:
    """Create or update the automations; those that send notifications only if there is a notification block.

    Args:
        client: A client of the Prefect server.
        webhook: The URL of a webhook to notify; None to keep the existing block.
    """
    document = _notification_block(client)
    if webhook:
        save_webhook(webhook)
    elif document and document.data.get("json_data") == MESSAGE and document.data["url"] != WEBHOOK:
        # It was saved by an earlier version, which did not store the URL as a secret.
        save_webhook(document.data["url"])
    block_id = getattr(_notification_block(client), "id", None)
    automations = [crash_silent_runs()]
    if block_id is None:
        print(f"alerts: off, there is no notification block {BLOCK}")
    else:
        automations += [notify_of_failures(block_id), notify_of_missing_nightly(block_id)]
        print(f"alerts: sent through {BLOCK}")
    for automation in automations:
        existing_automations = client.read_automations_by_name(automation.name)
        if not existing_automations:
            client.create_automation(automation)
        # An update creates a new trigger, which forgets the runs that it is watching.
        elif _core(existing_automations[0]) != _core(automation):
            client.update_automation(existing_automations[0].id, automation)


def save_webhook(url: str) -> None:
    """Save the block that calls the webhook. Its URL is a secret: anyone who has it can write to the channel."""
    block = CustomWebhookNotificationBlock.model_validate(
        {"name": BLOCK, "url": WEBHOOK, "method": "POST", "json_data": MESSAGE, "secrets": {"url": url}}
    )
    block.save(BLOCK, overwrite=True)


def crash_silent_runs() -> AutomationCore:
    """Return the automation that marks a run as Crashed if its process, machine, or network died."""
    silence = timedelta(seconds=float(os.environ.get("QUANTIZE_GEMMA_SILENCE_SECONDS", SILENCE_SECONDS)))
    return AutomationCore(
        name="quantize-gemma: mark runs without heartbeats as crashed",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *END_EVENTS},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OUR_FLOWS,
            for_each={"prefect.resource.id"},
            threshold=1,
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, name="Crashed", message="It stopped sending heartbeats.", force=False
            )
        ],
    )


def notify_of_failures(block_id: UUID) -> AutomationCore:
    """Return the automation that reports every run that failed or crashed, including those without heartbeats."""
    return AutomationCore(
        name="quantize-gemma: a run failed",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OUR_FLOWS,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[_notify(block_id, "quantize-gemma: a run failed", BODY)],
    )


def notify_of_missing_nightly(block_id: UUID) -> AutomationCore:
    """Return the automation that reports a night in which no nightly run started."""
    night = timedelta(seconds=float(os.environ.get("QUANTIZE_GEMMA_NIGHT_SECONDS", NIGHT_SECONDS)))
    return AutomationCore(
        name="quantize-gemma: the nightly run did not start",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Running"},
            expect={"prefect.flow-run.Running"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "deployment", "prefect.resource.name": "nightly"},
            threshold=1,
            within=night,
        ),
        actions=[
            _notify(
                block_id,
                "quantize-gemma: the nightly run did not start",
                f"No nightly run has started in the last {night.total_seconds() / 3600:g} hours.",
            )
        ],
    )


def _notification_block(client: SyncPrefectClient) -> BlockDocument | None:
    return next((document for document in client.read_block_documents() if document.name == BLOCK), None)


def _core(automation: AutomationCore) -> dict[str, object]:
    return automation.model_dump(mode="json", include=set(AutomationCore.model_fields))


def _notify(block_id: UUID, subject: str, body: str) -> SendNotification:
    return SendNotification(block_document_id=block_id, subject=subject, body=body)
