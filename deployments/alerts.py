"""What the server does by itself: ends runs that stopped sending heartbeats, and tells of what went wrong.

Notifications go through a notification block called `quantize-gemma-alerts`, of any kind: made in Prefect's UI
(Slack, e-mail, …), or from QUANTIZE_GEMMA_ALERTS, which becomes a custom web hook. Without one they are off.
"""

import os
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import BlockDocument, StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

BLOCK = "quantize-gemma-alerts"
# Stands for the address in the block, which keeps it among its secrets.
WEB_HOOK = "{{url}}"
MESSAGE = {"subject": "{{subject}}", "text": "{{body}}"}
OURS = {"prefect.resource.role": "flow", "prefect.resource.name": ["quantize-gemma", "prune-store"]}
ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")}
# Workers send a heartbeat every 30 s (PREFECT_FLOWS_HEARTBEAT_FREQUENCY). A server that is away hears none of them, and
# must not take a restart of its own for the death of all runs.
SILENCE = timedelta(seconds=float(os.environ.get("QUANTIZE_GEMMA_SILENCE_SECONDS", 900)))
# Without a nightly run for so long: a day of 25 hours, and an hour's grace. Another schedule needs another.
NIGHT = timedelta(seconds=float(os.environ.get("QUANTIZE_GEMMA_NIGHT_SECONDS", 26 * 3600)))
BODY = (
    "Flow run {{ flow_run.name }} of quantize-gemma is {{ flow_run.state.name }}: {{ flow_run.state.message }}\n"
    "{{ flow_run|ui_url }}"
)


def save_alerts(client: SyncPrefectClient, web_hook: str | None) -> None:
    """Makes or updates the automations; those that notify only if there is a block to notify through."""
    document = _notification_block(client)
    if web_hook:
        save_web_hook(web_hook)
    elif document and document.data.get("json_data") == MESSAGE and document.data["url"] != WEB_HOOK:
        # Made by an earlier version, which did not keep the address as a secret.
        save_web_hook(document.data["url"])
    block_id = getattr(_notification_block(client), "id", None)
    wanted = [silent_run_is_crashed()]
    if block_id is None:
        print(f"alerts: off, there is no notification block {BLOCK}")
    else:
        wanted += [failed_run_is_told(block_id), missing_nightly_is_told(block_id)]
        print(f"alerts: through {BLOCK}")
    for automation in wanted:
        there = client.read_automations_by_name(automation.name)
        if not there:
            client.create_automation(automation)
        # An update makes a new trigger, which forgets the runs that are being waited for.
        elif _core(there[0]) != _core(automation):
            client.update_automation(there[0].id, automation)


def save_web_hook(url: str) -> None:
    """Saves the block that calls the address, which is a secret itself: whoever has it can write to the channel."""
    block = CustomWebhookNotificationBlock(
        name=BLOCK,
        url=WEB_HOOK,
        method="POST",
        json_data=MESSAGE,
        secrets={"url": url},
    )
    block.save(BLOCK, overwrite=True)


def silent_run_is_crashed() -> AutomationCore:
    """A run whose process, machine or network died does not stay Running: its state becomes Crashed."""
    return AutomationCore(
        name="quantize-gemma: silent runs have crashed",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ENDED},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OURS,
            for_each={"prefect.resource.id"},
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message="It stopped sending heartbeats.")],
    )


def failed_run_is_told(block_id: UUID) -> AutomationCore:
    """A run that failed, or crashed (the silent ones too), is told."""
    return AutomationCore(
        name="quantize-gemma: a run failed",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OURS,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[_tell(block_id, "quantize-gemma: a run failed", BODY)],
    )


def missing_nightly_is_told(block_id: UUID) -> AutomationCore:
    """A night without a nightly run, or with one that never ran, is told."""
    return AutomationCore(
        name="quantize-gemma: the nightly did not start",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Running"},
            expect={"prefect.flow-run.Running"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "deployment", "prefect.resource.name": "nightly"},
            threshold=1,
            within=NIGHT,
        ),
        actions=[
            _tell(block_id, "quantize-gemma: the nightly did not start", f"No nightly run has started for {NIGHT}.")
        ],
    )


def _core(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(mode="json", include=set(AutomationCore.model_fields))


def _tell(block_id: UUID, subject: str, body: str) -> SendNotification:
    return SendNotification(block_document_id=block_id, subject=subject, body=body)


def _notification_block(client: SyncPrefectClient) -> BlockDocument | None:
    return next((document for document in client.read_block_documents() if document.name == BLOCK), None)
