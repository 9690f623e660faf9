"""Who may call what: the one table. A route that is missing here is refused to everybody (`security.admit`).

That a person reaches only their own work is not here but in the services, which know assignments by their owner alone.
"""

from typing import Literal

from groundup.feedback.tables import Role

Caller = Literal["anonymous"] | Role

ANYONE: frozenset[Caller] = frozenset({"anonymous", "annotator", "reviewer", "admin"})
SIGNED_IN: frozenset[Caller] = frozenset({"annotator", "reviewer", "admin"})
REVIEWERS: frozenset[Caller] = frozenset({"reviewer", "admin"})
ADMINS: frozenset[Caller] = frozenset({"admin"})

ACCESS: dict[tuple[str, str], frozenset[Caller]] = {
    # Getting in and out
    ("GET", "/health"): ANYONE,
    ("GET", "/login"): ANYONE,
    ("POST", "/login"): ANYONE,
    ("GET", "/invitations/{token}"): ANYONE,
    ("POST", "/invitations/{token}"): ANYONE,
    ("POST", "/logout"): SIGNED_IN,
    ("GET", "/account"): SIGNED_IN,
    ("POST", "/account/password"): SIGNED_IN,
    # Work
    ("GET", "/"): SIGNED_IN,
    ("GET", "/projects/{project_id}"): SIGNED_IN,
    ("POST", "/projects/{project_id}/next"): SIGNED_IN,
    ("POST", "/projects/{project_id}/undo"): SIGNED_IN,
    ("POST", "/projects/{project_id}/reviews/next"): REVIEWERS,
    ("GET", "/tasks/{assignment_id}"): SIGNED_IN,
    ("PUT", "/tasks/{assignment_id}/draft"): SIGNED_IN,
    ("POST", "/tasks/{assignment_id}/heartbeat"): SIGNED_IN,
    ("POST", "/tasks/{assignment_id}/submit"): SIGNED_IN,
    ("POST", "/tasks/{assignment_id}/skip"): SIGNED_IN,
    # Dialogues with models
    ("POST", "/tasks/{assignment_id}/turns"): SIGNED_IN,
    ("POST", "/tasks/{assignment_id}/turns/{number}/stream"): SIGNED_IN,
    ("POST", "/tasks/{assignment_id}/turns/{number}/judgement"): SIGNED_IN,
    ("POST", "/tasks/{assignment_id}/turns/{number}/drop"): SIGNED_IN,
    ("POST", "/tasks/{assignment_id}/responses/stream"): SIGNED_IN,
    # Administration (routes_admin.py)
    ("GET", "/admin"): REVIEWERS,
    ("GET", "/admin/projects/new"): ADMINS,
    ("POST", "/admin/projects"): ADMINS,
    ("GET", "/admin/projects/{project_id}"): REVIEWERS,
    ("GET", "/admin/projects/{project_id}/settings"): ADMINS,
    ("POST", "/admin/projects/{project_id}/settings"): ADMINS,
    ("POST", "/admin/projects/{project_id}/batches"): ADMINS,
    ("POST", "/admin/batches/{batch_id}/open"): ADMINS,
    ("GET", "/admin/projects/{project_id}/items"): ADMINS,
    ("POST", "/admin/projects/{project_id}/items"): ADMINS,
    ("GET", "/admin/items/{item_id}"): ADMINS,
    ("GET", "/admin/projects/{project_id}/export"): ADMINS,
    ("GET", "/admin/people"): ADMINS,
    ("POST", "/admin/people/invitations"): ADMINS,
    ("POST", "/admin/people/invitations/{invitation_id}/revoke"): ADMINS,
    ("POST", "/admin/people/{user_id}/password"): ADMINS,
    ("POST", "/admin/people/{user_id}/role"): ADMINS,
    ("POST", "/admin/people/{user_id}/active"): ADMINS,
    ("GET", "/admin/endpoints"): ADMINS,
    ("POST", "/admin/endpoints"): ADMINS,
    ("GET", "/admin/endpoints/{endpoint_id}"): ADMINS,
    ("POST", "/admin/endpoints/{endpoint_id}"): ADMINS,
    ("POST", "/admin/endpoints/{endpoint_id}/test"): ADMINS,
}
