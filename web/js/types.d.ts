// What these scripts get from Refrain's server (nodes/runs.py). For `make lint-web` only.

export type Action = "computed" | "reused" | "forecast";

export interface Call {
  step: number | null; // counted from 0; null while it is still on the device, as are sigma and seconds
  sigma: number | null;
  evaluation: number; // counted from 1
  branches: string[];
  action: Action;
  strategy: string;
  reason: string;
  measure: number | null;
  threshold: number | null;
  computed_share: number;
  in_part: boolean; // neither computed nor skipped as a whole
  seconds: number | null;
}

export interface Totals extends Record<Action, number> {
  calls: number;
  branches: Record<string, Record<Action, number>>;
  computed_share: number;
  speed_up: number | null;
  steps_done: number;
  steps_skipped: number;
  steps_in_part: number;
  seconds: number;
  seconds_uncached: number | null; // about
  bytes_held: number;
  bytes_away?: number;
  gaps_repaired?: number;
}

export interface Report {
  summary: string;
  state: "running" | "finished" | "stopped";
  steps: number;
  totals: Totals;
  measures: {
    threshold: number;
    evaluations: number;
    quantiles: { percent: number; value: number; reuses: number }[];
  } | null;
  strategies: {
    title: string;
    node: string | null;
    resting: string; // why it is left out of the run
    settings?: Record<string, unknown>;
  }[];
  advice: { threshold: number; skips: number; of: number }[]; // a higher threshold first
  why_nothing: string; // was reused
  warnings: string[];
  notes: string[];
  calls: Call[];
}

export interface Run {
  id: string;
  began: number;
  prompt_id: string | null;
  workflow: string | null;
  sampler: string | null;
  nodes: string[];
  shown_by: string[];
  first: number; // number in the run of the first of `report.calls`
  report: Report;
}

export type Part = "timeline" | "report" | "choice";

export interface View {
  part: Part;
  root: HTMLElement;
  show?(run: Run, node: string): void; // the node that it is on
  showEarlier?(run: Run, node: string): void; // the last prompt needed no sampling: its samples are those of this run
  fill?(output: any): void; // what the node put out
  age(): void; // what is shown is not of the last prompt
}

/** A prompt that has ended. */
export interface Prompt {
  id: string;
  workflow: string | undefined;
  nodes: Record<string, { class_type: string; inputs: Record<string, unknown> }>;
  outputs: Record<string, any>;
  cached: string[]; // nodes whose results of before were taken over
  began: number; // seconds since 1970
}
