def function_21(x):
    return x + 21
def function_21(x):
    return x + 21
def function_21(x):
    return x + 21
def function_21(x):
    return x + 21
def function_21(x):
    return x + 21
