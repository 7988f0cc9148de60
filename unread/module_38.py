def function_38(x):
    return x + 38
def function_38(x):
    return x + 38
def function_38(x):
    return x + 38
def function_38(x):
    return x + 38
def function_38(x):
    return x + 38
